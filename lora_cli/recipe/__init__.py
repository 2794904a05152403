"""Recipes: keys, strict YAML, messages, schema, and the objects that PEFT, TRL and transformers take."""
