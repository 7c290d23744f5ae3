"""Files of adapters and models, of every program: read, written, converted, merged."""
