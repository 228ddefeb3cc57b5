"""A model: its description (`description.ModelConfig`), and the families of Hugging Face."""
