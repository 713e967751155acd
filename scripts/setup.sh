#!/bin/sh
# Sets up what is missing: Debian packages, .venv, the project and its dependencies in it.
# Usage: scripts/setup.sh run|dev|bench   ("dev" adds the tools that `make test` needs, "bench" those
# and what `make bench` compares with)
# Does nothing that is already done; a stamp in .venv remembers the installed pyproject.toml.
set -eu
cd "$(dirname "$0")/.."

what=${1:-run}
python=/usr/bin/python3
venv=.venv
stamp=$venv/.stamp-$what

say() { printf '%s\n' "setup: $*"; }
fail() {
    printf '%s\n' "setup: $1" >&2
    shift
    for line in "$@"; do printf '%s\n' "       $line" >&2; done
    exit 1
}

installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'; }

# --- Debian packages -----------------------------------------------------------------------------
# python3-venv: to make .venv. python3-bpfcc: bcc exists for Debian's own Python only, which is why
# .venv is made from /usr/bin/python3 and sees the system's packages. linux-libc-dev: the kernel's
# headers that eBPF programs are compiled with. gcc and libc6-dev: the automaton of requests for the
# proxy's own process (l7proxy/native.c), and the clients and backends of the torture test. curl: the
# client outside in `make run`. Tests use other people's HTTP clients as peers and attackers: nghttp
# and slowhttptest, and bridge and ptp of CNI, which ours stands behind. The torture test has nginx and HAProxy as backends too.
packages="python3-venv python3-bpfcc linux-libc-dev gcc libc6-dev curl"
[ "$what" = run ] || packages="$packages nghttp2-client slowhttptest nginx haproxy containernetworking-plugins"
# wrk is the client of the comparison with peers, of which nginx and haproxy are two.
[ "$what" != bench ] || packages="$packages wrk"
if command -v dpkg-query >/dev/null 2>&1; then
    missing=""
    for package in $packages; do
        installed "$package" || missing="$missing $package"
    done
    if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing Debian packages:$missing (a minute or so)"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq || say "apt-get update failed; trying with the package lists there are"
        # shellcheck disable=SC2086  # a list of names
        apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
            fail "apt-get could not install$missing" \
                "Look at the messages above; then run: apt-get install$missing"
    elif [ -n "$missing" ]; then
        case "$missing" in
        *python3-venv*)
            fail "missing Debian packages:$missing" \
                "They are installed as root: sudo apt-get update && sudo apt-get install$missing" \
                "Then run make again." ;;
        *)
            say "note: not installed:$missing; the ingress gateway does without."
            say "      To install: sudo apt-get install$missing" ;;
        esac
    fi
else
    say "note: this is not Debian; python3 (3.11 or newer) with venv has to be there already."
fi

[ -x "$python" ] || fail "there is no $python" "Install it: apt-get install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" --version), Weft needs 3.11 or newer (Debian 12 has it)"

# What is compiled for the proxy, unless it is there; the proxy goes on without.
compile() {
    "$venv/bin/python" -m l7proxy.native || true
    "$venv/bin/python" -m mesh.cni.shim || true
}

# --- .venv ---------------------------------------------------------------------------------------
if [ -f "$stamp" ] && cmp -s "$stamp" pyproject.toml; then
    compile
    exit 0
fi
if ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "making $venv from $python"
    "$python" -m venv --system-site-packages "$venv" ||
        fail "could not make $venv" "Remove it (rm -r $venv) and run make again."
fi

case $what in
run) target=. ;;
dev) target='.[dev]' ;;
bench) target='.[dev,bench]' ;;
*) fail "unknown set-up \"$what\": run, dev or bench" ;;
esac
say "installing the project and its dependencies into $venv (a minute or two the first time)"
# Doubly quiet: errors only. A network that is away shows as an error after pip's own retries.
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -e "$target" ||
    fail "pip could not install the dependencies of pyproject.toml" \
        "If there is no network: give pip a directory of wheels (PIP_FIND_LINKS=DIR PIP_NO_INDEX=1)."
compile
cp pyproject.toml "$stamp"
# What tests need, running needs too; and bench has all.
[ "$what" = run ] || cp pyproject.toml "$venv/.stamp-run"
[ "$what" != bench ] || cp pyproject.toml "$venv/.stamp-dev"
say "done"
