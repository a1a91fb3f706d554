"""How people come in: recipes, capture, compress and prepare, torch.compile, reports, the shell."""
