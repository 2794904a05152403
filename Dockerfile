# lora in a container, as one who is not root. Two images, of the versions that the tests ran with:
#   docker build --target cpu -t lora:cpu .      no GPU
#   docker build --target cuda -t lora:cuda .    NVIDIA GPUs; torch's own wheels bring CUDA, the host its driver
# Your files are /work; what is fetched and prepared is kept in /cache:
#   docker run --rm -it --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" -v lora:/cache lora:cuda train mine.yaml

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY lora_cli/constraints.txt /constraints.txt
RUN pip install --no-cache-dir -c /constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY lora_cli lora_cli
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS base
# A C compiler, with which Triton builds what starts its kernels. Debian's versions go as they are replaced.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Anybody may be the user (--user): torch asks who it is, and the hub's cache and ours need a place.
ENV USER=lora HOME=/home/lora HF_HOME=/cache/huggingface LORA_CACHE_DIR=/cache/lora
RUN useradd --create-home --uid 1000 lora \
    && mkdir /work /cache \
    && chmod 1777 /home/lora /work /cache
COPY --from=wheel /wheels /wheels
COPY lora_cli/constraints.txt /constraints.txt
WORKDIR /work
ENTRYPOINT ["lora"]
CMD ["--help"]

FROM base AS cpu
RUN pip install --no-cache-dir -c /constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && set -- /wheels/*.whl \
    && pip install --no-cache-dir -c /constraints.txt "$1[gguf,serve]"
USER 1000

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN set -- /wheels/*.whl && pip install --no-cache-dir -c /constraints.txt "$1[gguf,serve]"
USER 1000
