"""Statistics of scores: values per document, paired comparisons, kept gains of experts, what documents can show."""
