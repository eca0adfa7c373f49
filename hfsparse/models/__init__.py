"""What is known of a user's model, whatever the version of transformers.

`loading` loads it; `fingerprint` reads what its config says of attention (shape, kinds of layers,
windows, rope), `window` how many tokens it can read, `chat` its chat template, `names` what it
calls its arguments. `logits` reads what hidden states say, `rope` forgets the lengths of calls
before, `weights` tells a fine-tune from its base, `greedy` has it answer greedily.
"""
