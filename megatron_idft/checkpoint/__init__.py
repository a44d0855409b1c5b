"""Models between Hugging Face safetensors folders and Megatron checkpoints."""
