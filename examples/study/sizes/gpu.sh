# shellcheck shell=bash disable=SC2034
# Ten minutes of one large GPU with 16 cores, by estimate: 33 runs of about 110 s, most of it the start of processes, six
# side by side. Not run. More problems and seeds than size cpu, and of its arms those that settle its first question;
# every other one joins by its name, as in cpu.sh.
problems=(--train 640 --test 256 --selection 128 --harder 128 --retention 64 --wrong-share 0.3)
seeds=(1 2 3 4 5)
arms=(sft idft dft idft_floor)
followers=()
explained=(sft idft)
rates=(3e-5 1e-4)
extensions=1
device=(--bf16)
steps=(8 16 32)
batch=4
pairs=16
pack_length=512
answer_tokens=96
samples=4
chat_samples=4
corpus_records=64
sampled=(test)
hint_flags=(--prompt-trial-records 16)
own_flags=(--rollout-samples 4 --rollout-temperature 0.7)
fewest=64
at_once=6
