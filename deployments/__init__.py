"""What the service deploys: `prefect.yaml`, and the recipes and evaluation tasks that come with the project."""
