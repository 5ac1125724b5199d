#!/usr/bin/env bash
# Twenty minutes with a real engine: capture public traffic in front of it, replay the capture
# straight to it, keep the engine's own counters all the while. Everything stays in WORK.
#
#   first_contact.sh capture WORK TRACE_A TRACE_B START...   # START... starts the engine, returns when it is ready
#   first_contact.sh replay  WORK                            # the captured tape at 1x, straight to the engine
#
# TRACE_A and TRACE_B are tapes (tokentape import); 3 minutes of A, then 1 minute of B are sent.
# A phase that was cut goes on where it stopped: what is done is marked in WORK/done.
# Needs `tokentape` (set TOKENTAPE to another way of calling it), curl and python3; no network.
set -euo pipefail
phase=${1:?capture or replay} work=${2:?a folder}
shift 2
engine=${ENGINE_URL:-http://127.0.0.1:8000}
proxy=127.0.0.1:${PROXY_PORT:-8080}
read -r -a tokentape <<<"${TOKENTAPE:-tokentape}"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work/done"

step() { # step NAME COMMAND...: once
  local name=$1
  shift
  [ -e "$work/done/$name" ] && return
  echo "== $name: $*" >&2
  "$@" || { # said here: a caller may not stop at it
    echo "first_contact.sh: $name failed, see $work/*.err" >&2
    return 1
  }
  touch "$work/done/$name"
}

scraping() { # scraping NAME COMMAND...: the engine's counters each second while COMMAND runs
  python3 "$here/scrape.py" "$engine/metrics" "$work/$1.metrics.jsonl.gz" &
  local scraper=$!
  shift
  local code=0
  "$@" || code=$?
  kill "$scraper" && wait "$scraper" || true
  return "$code"
}

watch_proxy() { # own CPU and memory of the proxy and its writer, each second
  while kill -0 "$1" 2>/dev/null; do
    for pid in "$1" $(cat "/proc/$1/task/$1/children" 2>/dev/null); do
      echo "$(date +%s.%N) $pid $(cut -d' ' -f14,15 "/proc/$pid/stat" 2>/dev/null) $(grep -h VmRSS "/proc/$pid/status" 2>/dev/null | tr -s '\t ' ' ')"
    done
    sleep 1
  done >"$work/proxy.usage"
}

send() { "${tokentape[@]}" replay "$1" --to "http://$proxy" --tape "$work/$2.tape" --window "$3" --timeout 240s --force 2>"$work/$2.err" | tee "$work/$2.txt"; }

capture() {
  "${tokentape[@]}" capture --upstream "$engine" --tape "$work/capture.tape" --listen "$proxy" --fact "gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || echo none)" 2>"$work/capture.err" &
  local capture_pid=$!
  until curl -s -o /dev/null "http://$proxy/health"; do kill -0 "$capture_pid" && sleep 0.2; done
  watch_proxy "$capture_pid" &
  local code=0
  step send-a send "$1" clients-a "${WINDOW_A:-0s..180s}" || code=$?
  step send-b send "$2" clients-b "${WINDOW_B:-0s..60s}" || code=$?
  kill -TERM "$capture_pid"
  wait "$capture_pid" || code=$?
  return "$code"
}

replay() {
  "${tokentape[@]}" replay "$work/capture.tape" --to "$engine" --tape "$work/run.tape" --timeout 240s --force 2>"$work/run.err" | tee "$work/run.txt"
}

case $phase in
  capture)
    trace_a=${1:?a tape} trace_b=${2:?a tape}
    shift 2
    curl -sf -o /dev/null "$engine/health" || "$@"
    curl -s "$engine/version" >"$work/engine.version" || true
    step capture scraping capture capture "$trace_a" "$trace_b"
    ;;
  replay)
    step replay scraping replay replay
    "${tokentape[@]}" check "$work/capture.tape" "$work/run.tape" | tee "$work/check.txt"
    "${tokentape[@]}" report "$work/capture.tape" "$work/run.tape" >"$work/report.txt"
    ;;
  *)
    echo "first_contact.sh: $phase: capture or replay" >&2
    exit 2
    ;;
esac
