# Sourced: hand pip's own index settings to uv, which doesn't read them; without any, let uv find
# the CPU build of torch by itself. Sets UV (a uv executable) and TORCH (arguments for it).
UV=${UV:-$(command -v uv || true)}
pip_setting() { ${PYTHON:-python3} -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
extra=${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
for url in $extra; do # a folder that isn't there is no index; pip ignores it, uv would stop
  case $url in file://*) [ -d "${url#file://}" ] || continue ;; esac
  export UV_INDEX="${UV_INDEX:+$UV_INDEX }$url"
done
# As pip does: any index may have the version that is asked for. Hashes decide what is installed.
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
TORCH=()
[ -n "$links$extra" ] || TORCH=(--torch-backend=cpu)
