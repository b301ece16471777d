"""The demo family: a tiny base and three experts, trained on the spot, with recipes and tasks for them."""
