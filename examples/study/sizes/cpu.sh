# shellcheck shell=bash disable=SC2034
# Two CPU cores. What it costs, and what was left out and why, is in README.md.
problems=(--train 160 --test 96 --selection 48 --harder 48 --retention 40 --wrong-share 0.3)
seeds=(1 2 3)
arms=(sft idft dft idft_floor idft_ends sft-realigned idft-realigned sft-own
      entropy prift asft idft_reference sft-distilled)
followers=(sft-noisy idft-noisy) # at the rates of sft and idft
explained=(sft idft idft_floor) # where they put their weight after training
rates=(3e-5 1e-4)
extensions=2
precision=(--bf16) # corpora and their scores are fp32
steps=(8 16 32)
batch=1         # packs in a step
pairs=4 # of answers in a step of dpo and simpo
pack_length=512 # tokens in a pack
answer_tokens=64
samples=4 # of each test problem, at the last checkpoint, at temperature 1
chat_samples=2 # of the base model to each chat prompt
corpus_records=16 # whose phi is measured under each trained model
sampled=(test)
hint_flags=(--prompt-trial-records 8)
own_flags=(--rollout-samples 4 --rollout-temperature 0.7) # at 1 hardly any is right
fewest=16 # records; a corpus of fewer is not trained on
at_once=2 # trainings and evaluations side by side, one thread each
