"""Distillation: a teacher's correct completions become traces, and a student is fine-tuned on them."""
