"""Where problems come from and how an answer is judged."""
