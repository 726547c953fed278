"""Everything that knows transformers' Trainer."""
