"""Models: loading, adapters, heads, tokenizers."""
