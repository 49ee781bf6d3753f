"""Devices, processes, signals and the host."""
