# make demo   sets everything up, fetches a real model, trains, merges, exports, serves and scores it: no GPU, no compiler, no hub account
# make demo-tiny   the same of a model that is made here, in a minute
# make test   sets everything up, and passes the tests
# make test-slow   passes those that take minutes; needs a C++ compiler, to build llama-quantize once, and Chromium, to look at reports; fetches a real model and DeepSpeed
# make test-lesser-cpu   passes them as a processor without AVX-512 would, and as one without AVX
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
TINY = build/tiny/DONE
REAL = build/smollm2/DONE
ENCODER = build/minilm/DONE

.DEFAULT_GOAL := test
.PHONY: demo demo-tiny methods test test-slow test-lesser-cpu lesser floors torture fuzz lint docs quantizer gsm8k gpu gpu-wheels clean

$(READY): pyproject.toml lora_cli/constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: lora needs Python 3.11 or newer, and $(PYTHON) is %s.%s\n\nhint: make PYTHON=python3.12 (any from 3.11 on)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,dev]'
	touch $@

$(TINY): scripts/make_tiny_model.py | $(READY)
	rm -rf build/tiny
	$(BIN)/python scripts/make_tiny_model.py build/tiny

$(REAL): scripts/real_model.py | $(READY)
	rm -rf build/smollm2
	$(BIN)/python scripts/real_model.py build/smollm2

$(ENCODER): scripts/real_model.py | $(READY)
	rm -rf build/minilm
	$(BIN)/python scripts/real_model.py build/minilm --model minilm

demo: $(READY)  ## a real model learns to answer orders with JSON: trained, merged, exported, served, scored
	$(BIN)/python scripts/demo.py

demo-tiny: $(READY) $(TINY)  ## a toy learns to reverse word lists: train, merge, export and compare, with LoRA
	$(BIN)/python scripts/demo_tiny.py lora

methods: $(READY) $(TINY)  ## the same with each method
	$(BIN)/python scripts/demo_tiny.py lora qlora dora qdora

quantizer: $(READY) $(TINY) build/llama-quantize/llama-quantize  ## our quantiser against llama.cpp's program, built once: needs a C++ compiler
	$(BIN)/lora setup-llama-cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow tests/gguf/test_quantize_bytes.py

build/llama-quantize/llama-quantize: scripts/build_llama_quantize.py | $(READY)
	$(BIN)/python scripts/build_llama_quantize.py

build/deepspeed: | $(READY)  ## for the tests of ZeRO-3 alone, and beside the environment that all others run in
	rm -rf $@.tmp
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -c constraints.txt --target $@.tmp deepspeed einops hjson msgpack ninja py-cpuinfo
	mv $@.tmp $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(READY) lint $(TINY)
	$(BIN)/lora setup-llama-cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(READY) $(TINY) $(REAL) $(ENCODER) build/llama-quantize/llama-quantize build/deepspeed  ## what takes minutes: a real model by each method end to end, kills, every type of llama-quantize's (a C++ compiler)
	$(BIN)/lora setup-llama-cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow $(if $(WITHOUT),-k "not ($(WITHOUT))")

# What torch, oneDNN and MKL use of the processor is read when they start. Each time the tiny model is made anew, of another
# seed and by those kernels: no test may hang on what one pretraining came to. The next target makes the usual one again.
test-lesser-cpu: $(READY)  ## `make test` with AVX2 at most, and with no AVX at all
	$(BIN)/lora setup-llama-cpp
	$(MAKE) lesser SEED=1 LESSER="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
	$(MAKE) lesser SEED=2 LESSER="ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2"

lesser:
	rm -rf build/tiny
	$(LESSER) $(BIN)/python scripts/make_tiny_model.py build/tiny --seed $(SEED)
	$(LESSER) PYTHONHASHSEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder; \
		passed=$$?; rm -rf build/tiny; exit $$passed

floors: $(READY) $(TINY)  ## some 360 tests with the lowest versions that pyproject.toml allows, torch excepted (5 min)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/floors.py

fuzz: $(READY) $(TINY)  ## 10,000 recipes, 2,000 data files, 2,000 adapters: no traceback, no hang, no gigabyte
	$(BIN)/python tests/torture/fuzz.py

torture: $(READY) $(TINY)  ## two hours: 1,200 attacks by strangers' files, signals at 300 instants, kill -9 at 600, a disk that fills, memory over 20 000 steps
	$(BIN)/lora setup-llama-cpp
	$(BIN)/python tests/torture/attack.py
	$(BIN)/python tests/torture/signals.py
	$(BIN)/python tests/torture/kill.py
	$(BIN)/python tests/torture/ranks.py
	$(BIN)/python tests/torture/disk.py
	$(BIN)/python tests/torture/rss.py
	$(BIN)/python -m tests.torture.own_files --only 60

# On a machine with an NVIDIA GPU, torch and no network: `make gpu-wheels` elsewhere, carry .gpu along, then `make gpu`.
# Nothing is installed into that machine's own environment.
gpu-wheels: $(READY) $(TINY)  ## .gpu: wheels for Python 3.12 on Linux, and the tiny model (45 MB)
	$(BIN)/python scripts/gpu_wheels.py .gpu

GPU_SITE ?= build/gpu-site
gpu:  ## everything worth knowing on one NVIDIA GPU, in nine minutes; OUT=build/gpu, GPU_OPTIONS="--device cpu --tiny" for a dry run
	test -d .gpu || { echo "error: there is no folder .gpu; hint: make gpu-wheels" >&2; exit 1; }
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $(GPU_SITE) .gpu/*.whl
	PYTHONPATH=$(CURDIR):$(abspath $(GPU_SITE)) PYTHONUNBUFFERED=1 $(PYTHON) scripts/bench_gpu.py --out $(or $(OUT),build/gpu) --budget $(or $(BUDGET),520) $(GPU_OPTIONS)

docs: $(READY) $(TINY)  ## the generated references, the shipped recipes' copies, and the site in build/site, each of whose links is followed
	cp lora_cli/recipe/shipped/*.yaml configs/
	$(BIN)/lora schema > configs/schema.json
	$(BIN)/lora schema --markdown > docs/reference/recipe.md
	$(BIN)/python scripts/make_reference.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/make_gpu_table.py
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.make_recipe_table
	$(BIN)/lora recipes --markdown > docs/reference/recipes.md
	$(BIN)/python -m scripts.make_rooms_picture
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	$(BIN)/python scripts/check_site.py build/site

clean:
	rm -rf build runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
