"""Interventions on the next token's logits, and ways of writing that `generate(custom_generate=...)` takes."""
