"""Quantization-aware fine-tuning whose export is proved equal to what was trained.

Nothing is imported here: `import qat` costs nothing, and serving never pulls in the trainer. Start reading at
`qat/build.py`.
"""

__version__ = "0.1.0"
