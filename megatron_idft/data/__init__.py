"""Conversations -> tokens and loss masks -> datasets. No Megatron here, and torch only for the datasets."""
