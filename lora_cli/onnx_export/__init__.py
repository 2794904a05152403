"""A model that reads and answers in one pass, as an ONNX file that says the same in onnxruntime.

Its doors, in the order a reader needs them:

    export    `lora export-onnx`: a merged or whole model becomes a folder with model.onnx
"""

__all__ = ["export"]
