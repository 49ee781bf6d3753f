"""Pretrained encoders and decoders, and their weight files."""
