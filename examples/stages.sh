# Sourced by the scripts that train: stages in the folder $runs; finished ones are kept, interrupted ones resumed.
mkdir -p "$runs"

train() { # NAME FLAGS...: a training with the flags of the script's array `flags`
    [ -f "$runs/$1/config.json" ] && return
    local resume=
    ls "$runs/$1"/checkpoints/*/run.json >/dev/null 2>&1 && resume=--resume
    layerskip finetune "${flags[@]}" --output "$runs/$1" $resume "${@:2}"
}

answer() { # MODEL ROWS: its autoregressive answers to $runs/ROWS.jsonl, as $runs/MODEL-ROWS.jsonl
    [ -f "$runs/$1-$2.jsonl" ] && return
    layerskip generate --model "$runs/$1" --strategy autoregressive --jsonl --threads 1 <"$runs/$2.jsonl" >"$runs/$1-$2.part"
    mv "$runs/$1-$2.part" "$runs/$1-$2.jsonl"
}

measured() { # NAME COMMAND FLAGS...: sweep-exits or bench into $runs/NAME; prints its table
    if [ -f "$runs/$1/results.json" ]; then
        layerskip "$2" --from "$runs/$1/results.json" --format markdown
    else
        layerskip "${@:2}" --output "$runs/$1" --format markdown --overwrite
    fi
}
