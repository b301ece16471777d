"""Building blocks of the merge methods: exact sums, random streams, selection by size, runs of rows, regression."""
