"""The service: its servers and processes, deployments, status, and the receiver of webhooks."""
