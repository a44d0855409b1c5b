"""Text from a Megatron model."""
