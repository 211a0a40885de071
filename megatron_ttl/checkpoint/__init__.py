"""The hinge: training state <-> checkpoint folder <-> Hugging Face model folder."""
