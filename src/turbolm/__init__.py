"""turbolm: scale-out recipes that pretrain language models fast on Accelerate and DeepSpeed."""

__version__ = "0.1.0"
