#!/usr/bin/env bash
# Every stage of the paper in order, each from the weights of the stage before it, by a small model on one core; then their curves.
# Every step that is finished is passed over, so the same command goes on after a kill.
#
#     examples/stages/run.sh                      all of it, into outputs/stages
#     OUT=/tmp/try SMALL=1 examples/stages/run.sh     the same commands in miniature: nothing is learnt, everything is run
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-outputs/stages}
PYTHON=${PYTHON:-python}
SHARDS=48 CHAINS=4 PAIR_SHARDS=8 SITUATIONS=12 PRESET=stage/small PROCESSES=${PROCESSES:-1} SMALL=${SMALL:-}
if [ -n "$SMALL" ]; then
    SHARDS=2 CHAINS=1 PAIR_SHARDS=4 SITUATIONS=2 PRESET=stage/debug
fi
export OMP_NUM_THREADS=1
emu3_vla() { "$PYTHON" -m emu3_vla.cli "$@"; }
stage() { # name, presets, steps, options...
    local steps=$3
    [ -z "$SMALL" ] || steps=2
    local every=$((steps > 10 ? steps / 10 : 1))
    emu3_vla train tokens="$OUT/tokens" preset="$2" steps="$steps" processes="$PROCESSES" \
        validate_every=$every checkpoint_every=$every output_dir="$OUT/$1" "${@:4}"
}

emu3_vla collect output_dir="$OUT/episodes" shards=$SHARDS chains_per_shard=$CHAINS seed=21 workers="$PROCESSES"
emu3_vla tokenize episodes="$OUT/episodes" checkpoint=calvin-d questions=envs.calvin.questions:Questions workers="$PROCESSES" output_dir="$OUT/tokens"

stage pretrain_images stage/pretrain_images,$PRESET 300
stage pretrain_video stage/pretrain_video,$PRESET 12 init_from="$OUT/pretrain_images/policy"
stage world_model stage/world_model,$PRESET 150 init_from="$OUT/pretrain_video/policy"
stage vla stage/vla,$PRESET 300 init_from="$OUT/world_model/policy"
stage vla_all stage/vla_all,$PRESET 250 init_from="$OUT/world_model/policy"
stage quality stage/quality,$PRESET 150 init_from="$OUT/pretrain_images/policy"
stage understand_describe stage/understand_describe,$PRESET 100 init_from="$OUT/pretrain_images/policy"
stage understand_instruct stage/understand_instruct,$PRESET 150 init_from="$OUT/understand_describe/policy"
stage interleave stage/interleave,$PRESET 150 init_from="$OUT/pretrain_images/policy"

# Preferences: of rollouts, those of the shipped policy, since this one seldom succeeds; of pictures, its own.
emu3_vla prefer output_dir="$OUT/rollout_pairs" policy=calvin-d shards=$PAIR_SHARDS situations_per_shard=$SITUATIONS workers="$PROCESSES"
stage dpo_rollouts stage/dpo 40 init_from=calvin-d model.max_position_embeddings=2048 preference.pairs="$OUT/rollout_pairs"
emu3_vla prefer output_dir="$OUT/picture_pairs" policy="$OUT/quality/policy" kind=images tokens="$OUT/tokens" samples=4 \
    shards=$PAIR_SHARDS situations_per_shard=$SITUATIONS workers="$PROCESSES"
stage dpo_pictures stage/dpo,$PRESET 40 init_from="$OUT/quality/policy" preference.pairs="$OUT/picture_pairs"

"$PYTHON" -m examples.stages.curves "$OUT"
