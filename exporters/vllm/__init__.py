"""Serving with vLLM: the plugin (``plugin``), the engine in a process of its own (``engine``), the exporter."""
