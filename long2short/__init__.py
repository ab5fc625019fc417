"""Long2short: four ways to make chains of thought brief, and the frontier that compares them. Built on `distill`."""
