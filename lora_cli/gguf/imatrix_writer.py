"""Write an importance matrix as llama.cpp reads it. A program of its own, since it needs the
converter's gguf package:

    PYTHONPATH=llama.cpp/gguf-py python imatrix_writer.py SUMS.safetensors MODEL.gguf OUT.gguf

SUMS holds sums of squares by the name of a Hugging Face module, and the number of tokens in its
metadata; MODEL says the architecture, and which tensors there are.
"""

from __future__ import annotations

import sys

import numpy as np
from safetensors import safe_open


def main(sums: str, model: str, out: str) -> None:
    """Map each module to its tensor in `model` and write `out`; print the modules that have
    none."""
    import gguf

    reader = gguf.GGUFReader(model)
    arch = reader.get_field("general.architecture").contents()
    blocks = reader.get_field(f"{arch}.block_count").contents()
    known = {tensor.name for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), blocks
    )
    writer = gguf.GGUFWriter(out, arch)
    writer.add_type(gguf.GGUFType.IMATRIX)
    with safe_open(sums, framework="np") as stored:
        about = stored.metadata()
        tokens, chunk = int(about["tokens"]), int(about["chunk"])
        writer.add_array("imatrix.datasets", [about["rows"]])
        writer.add_uint32("imatrix.chunk_count", -(-tokens // chunk))
        writer.add_uint32("imatrix.chunk_size", chunk)
        for module in stored.keys():  # noqa: SIM118
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name not in known:
                print(f"left out: {module}")
                continue
            writer.add_tensor(f"{name}.in_sum2", stored.get_tensor(module).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
