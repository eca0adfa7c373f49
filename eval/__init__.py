"""Tasks that show what a sparse plan costs: paired runs, dense beside sparse.

hfsparse eval ruler MODEL --plan plan.yaml -o DIR
hfsparse eval needle MODEL --plan plan.yaml -o DIR
hfsparse eval turns MODEL --plan plan.yaml -o DIR
hfsparse eval decode MODEL --plan plan.yaml -o DIR
hfsparse eval ppl MODEL --plan plan.yaml -o DIR
hfsparse eval recall MODEL --plan plan.yaml -o DIR
hfsparse eval custom MODEL --plan plan.yaml --data qa.jsonl -o DIR
"""
