"""shoal: private infrastructure for large language models on the machines an organisation already owns."""

__version__ = "0.1.0"
