"""What the merge methods are made of: exact sums, random streams, selection by size, runs of rows."""
