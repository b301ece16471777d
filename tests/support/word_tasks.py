"""A task of lm-eval that writes, on the words of `tests.support.models`."""

WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: words.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["w7"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
