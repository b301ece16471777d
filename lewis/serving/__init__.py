"""Serving: the champion of a registered model is put into service, and what is in service is recorded.

A recipe's block `serve` lists targets. `service.serve` brings one of them to the champion; one that fails keeps what it
had. What a target has is a tag of the registered model (`records`), so that every machine sees it. It is written after
the target has taken the model: if a process dies before that, the next one does it again.
"""
