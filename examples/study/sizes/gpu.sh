# shellcheck shell=bash disable=SC2034
# One GPU: all arms, five seeds, more problems. Neither run nor sized: how long it takes is not known.
problems=(--train 1024 --test 512 --selection 256 --harder 256 --retention 64 --wrong-share 0.3)
seeds=(1 2 3 4 5)
arms=(sft idft dft idft_floor idft_ends entropy idft_reference prift asft sft-own sft-realigned idft-realigned sft-distilled)
followers=(sft-noisy dft-noisy idft-noisy)
explained=(sft idft idft_floor)
rates=(1e-5 3e-5 1e-4)
extensions=1
steps=(16 32 64)
batch=4
pairs=16
pack_length=512
answer_tokens=128
samples=4
chat_samples=4
corpus_records=128
sampled=(test)
hint_flags=(--prompt-trial-records 16)
own_flags=(--rollout-samples 4 --rollout-temperature 0.7)
fewest=64
at_once=4
device=(--bf16)
