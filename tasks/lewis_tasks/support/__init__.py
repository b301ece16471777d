"""What the tasks share: caching, the device slot, failures, logs, assets, facts about the flow run."""
