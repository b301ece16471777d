"""Whether models belong together, before they are merged: measures of their task vectors, and findings in words."""
