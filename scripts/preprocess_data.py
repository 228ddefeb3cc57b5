#!/usr/bin/env python
"""Make Megatron's `.bin/.idx` from text files or JSON lines; see `helix_megatron.data.preprocess`.

    scripts/preprocess_data.py --input book.txt --output-prefix data/book --append-eod
    scripts/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model tokenizer.json --append-eod --workers 8
"""

from helix_megatron.data.preprocess import main

# Worker processes import this file again.
if __name__ == "__main__":
    main()
