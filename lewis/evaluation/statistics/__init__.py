"""What scores say: values per document, paired comparisons, what is kept of the experts' gains, what documents show."""
