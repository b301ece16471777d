"""What scores say: values per document, paired comparisons of models, what is kept of the experts' gains."""
