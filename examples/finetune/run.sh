#!/usr/bin/env bash
# The walk-through of docs/finetune.md from end to end. Every step that is finished is passed over, so the same command goes on after a kill.
#
#     examples/finetune/run.sh                      all of it, into outputs/pointing
#     OUT=/tmp/try SMALL=1 examples/finetune/run.sh     the same commands in miniature: nothing is learnt, everything is run
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-outputs/pointing}
PYTHON=${PYTHON:-python}
EPISODES=50 PART=300 SHARDS=16 CHAINS=4 STEPS=400 BATCH=32 ROLLOUTS=50 PER_TASK=5 LIMIT=240 TASKS='[]'
PROCESSES=${PROCESSES:-2} HELD_OUT=0.05 COMPILE=${COMPILE:-true}
if [ -n "${SMALL:-}" ]; then
    EPISODES=3 PART=60 SHARDS=2 CHAINS=1 STEPS=2 BATCH=4 ROLLOUTS=1 PER_TASK=1 LIMIT=20 TASKS='[open_drawer]'
    PROCESSES=1 HELD_OUT=0.5 COMPILE=false
fi
export OMP_NUM_THREADS=1
emu3_vla() { "$PYTHON" -m emu3_vla.cli "$@"; }

# The demonstrations: recorded, looked at, converted.
"$PYTHON" -m examples.finetune.teleoperation output_dir="$OUT/recorded" episodes=$EPISODES seed=0
[ -f "$OUT/inspected/inspection.json" ] || emu3_vla inspect "$OUT/recorded" output_dir="$OUT/inspected"
emu3_vla convert source="$OUT/recorded" target_format=zarr mapping=examples/finetune/mapping.yaml steps_per_part=$PART output_dir="$OUT/episodes"
# Demonstrations of the old tasks, so that they are not forgotten; then both in the checkpoint's own ids.
emu3_vla collect output_dir="$OUT/replay" shards=$SHARDS chains_per_shard=$CHAINS seed=7 workers=$PROCESSES
emu3_vla tokenize episodes="[$OUT/episodes,$OUT/replay]" checkpoint=calvin-d scene=checkpoint workers=$PROCESSES output_dir="$OUT/tokens"

shared=(tokens="$OUT/tokens" init_from=calvin-d steps=$STEPS batch_size=$BATCH processes=$PROCESSES compile=$COMPILE
    validation_fraction=$HELD_OUT validate_every=100 learn_codes=false model.dropout=0.1 model.hide_codes=0.1
    scene_fraction=0.85 loss.text_weight=1 loss.vision_loss_fraction=0.05 optimizer.warmup_steps=50 optimizer.ema_decay=0.99)
emu3_vla train "${shared[@]}" lora_rank=16 optimizer.learning_rate=1e-3 output_dir="$OUT/lora"
emu3_vla train "${shared[@]}" optimizer.learning_rate=3e-4 output_dir="$OUT/full"

for name in before lora full; do
    policy=calvin-d
    [ $name = before ] || policy="$OUT/$name/policy"
    "$PYTHON" -m examples.finetune.evaluate policy="$policy" rollouts=$ROLLOUTS max_steps=$LIMIT output_dir="$OUT/new_task/$name"
    emu3_vla eval policy="$policy" eval.protocol=mtlc eval.rollouts_per_task=$PER_TASK eval.workers=$PROCESSES eval.tasks="$TASKS" \
        eval.max_steps=$LIMIT \
        output_dir="$OUT/old_tasks/$name"
done
"$PYTHON" -m examples.finetune.compare "$OUT"
