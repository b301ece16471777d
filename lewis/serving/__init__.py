"""Serving: the champion of a registered model is put into service, and what is in service is recorded.

A recipe's block `serve` lists targets. `service.serve` puts the champion into service at one; if that fails, the target
keeps what it had. A tag of the registered model records what each target has (`records`), so that every machine sees
it. The tag is written after the target has taken the model: if a process dies before that, the next one tries again.
"""
