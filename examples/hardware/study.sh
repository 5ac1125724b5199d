#!/usr/bin/env bash
# Does a replay reproduce a capture, and what does other hardware do with it? Four loads are captured in
# front of a real engine, each is replayed twice straight to it, one at several speeds, one with the proxy in the path.
#
#   study.sh warm     WORK LOAD.tape...     # each once, not kept: an engine's first load compiles kernels
#   study.sh capture  WORK LOAD.tape...     # each load through the proxy: WORK/capture-LOAD.tape
#   study.sh replay   WORK CAPTURE.tape...  # each twice at 1x: WORK/run-LOAD-1.tape, -2
#   study.sh sweep    WORK CAPTURE.tape     # at 0.5x, 2x and 4x
#   study.sh overhead WORK CAPTURE.tape     # at 1x through the proxy once more
#   study.sh report   WORK                  # what can be said here, as text
#
# ENGINE_URL serves already (http://127.0.0.1:8000). TOKENTAPE is another way of calling tokentape. A phase that was cut
# goes on where it stopped: what is done is marked in WORK/done. NAME=VALUE in FACTS are kept on every tape.
set -euo pipefail
phase=${1:?warm, capture, replay, sweep, overhead or report} work=${2:?a folder}
shift 2
engine=${ENGINE_URL:-http://127.0.0.1:8000}
proxy=127.0.0.1:${PROXY_PORT:-8080}
read -r -a tokentape <<<"${TOKENTAPE:-tokentape}"
read -r -a facts <<<"${FACTS:-}"
fact_options=()
for fact in "${facts[@]}"; do fact_options+=(--fact "$fact"); done
telemetry=(--metrics-url "$engine/metrics")
nvidia-smi >/dev/null 2>&1 && telemetry+=(--gpu)
mkdir -p "$work/done" "$work/said"

step() { # step NAME COMMAND...: once
  local name=$1
  shift
  [ -e "$work/done/$name" ] && return
  echo "== $(date +%T) $name: $*" >&2
  "$@" >"$work/said/$name.txt" 2>"$work/said/$name.err" || {
    echo "study.sh: $name failed, see $work/said/$name.err" >&2
    return 1
  }
  touch "$work/done/$name"
}

name_of() { # /a/capture-mooncake.tape -> mooncake
  local name
  name=$(basename "$1" .tape)
  echo "${name#capture-}"
}

send() { # send SOURCE TARGET TAPE OPTION...
  local source=$1 to=$2 tape=$3
  shift 3
  "${tokentape[@]}" replay "$source" --to "$to" --tape "$tape" --timeout 240s --force --plain \
    "${fact_options[@]}" "$@"
}

through_proxy() { # through_proxy CAPTURE.tape COMMAND...: COMMAND while a capture runs
  local tape=$1 code=0
  shift
  rm -rf "$tape"
  "${tokentape[@]}" capture --upstream "$engine" --tape "$tape" --listen "$proxy" \
    "${telemetry[@]}" "${fact_options[@]}" &
  local capture_pid=$!
  until curl -s -o /dev/null "http://$proxy/health"; do kill -0 "$capture_pid" && sleep 0.2; done
  "$@" || code=$?
  kill -TERM "$capture_pid"
  wait "$capture_pid" || code=$?
  return "$code"
}

case $phase in
  warm)
    for load in "$@"; do
      name=$(name_of "$load")
      step "warm-$name" send "$load" "$engine" "$work/warm-$name.tape"
      rm -rf "$work/warm-$name.tape"
    done
    ;;
  capture)
    for load in "$@"; do
      name=$(name_of "$load")
      step "capture-$name" through_proxy "$work/capture-$name.tape" \
        send "$load" "http://$proxy" "$work/clients-$name.tape" --session-header x-session-id
    done
    ;;
  replay)
    for round in 1 2; do
      for tape in "$@"; do
        name=$(name_of "$tape")
        step "run-$name-$round" send "$tape" "$engine" "$work/run-$name-$round.tape" "${telemetry[@]}"
      done
    done
    ;;
  sweep)
    name=$(name_of "$1")
    for speed in 0.5x 2x 4x; do
      step "sweep-$name-$speed" send "$1" "$engine" "$work/sweep-$name-$speed.tape" --speed "$speed" "${telemetry[@]}"
    done
    ;;
  overhead)
    name=$(name_of "$1")
    step "overhead-$name" through_proxy "$work/overhead-proxy-$name.tape" \
      send "$1" "http://$proxy" "$work/overhead-$name.tape"
    ;;
  report)
    for tape in "$work"/capture-*.tape "$work"/run-*.tape "$work"/sweep-*.tape; do
      [ -e "$tape/tape.json" ] || continue
      name=$(basename "$tape" .tape)
      step "report-$name" "${tokentape[@]}" report "$tape" --phases
    done
    for capture in "$work"/capture-*.tape; do
      name=$(name_of "$capture")
      run=$work/run-$name
      [ -e "$run-1.tape/tape.json" ] || continue
      step "compare-$name-capture" "${tokentape[@]}" compare "$capture" "$run-1.tape"
      [ -e "$run-2.tape/tape.json" ] && step "compare-$name-runs" "${tokentape[@]}" compare "$run-1.tape" "$run-2.tape"
    done
    ;;
  *)
    echo "study.sh: $phase: warm, capture, replay, sweep, overhead or report" >&2
    exit 2
    ;;
esac
