#!/usr/bin/env bash
# Runs a program on a slice of TPUs, or on machines with GPUs, of a Google Kubernetes Engine cluster, as a JobSet.
#
#     launch/gke_jobset.sh --name=retro --image=REGION-docker.pkg.dev/P/R/retro_jax:1 \
#         --accelerator=v4 --topology=4x4x4 --volume=retro-files:/mnt/retro \
#         -- python launch/train.py --config=… --workdir=/mnt/retro/runs/172m
#     launch/gke_jobset.sh --name=retro --image=… --gpu=nvidia-h100-80gb --hosts=4 -- python launch/train.py …
#
# The cluster has the JobSet controller and a node pool of this accelerator; kubectl is connected to it. The image is
# made from launch/Dockerfile. One Job runs one pod on each host. A pod that ends with 1, the user's mistake, fails the
# JobSet; any other failure (a preemption, 143 after SIGTERM, a crash) restarts all of it, and the program goes on from
# its checkpoint.
#
#     --accelerator=v4|v5e|v5p|v6e  --topology=AxBxC (AxB for v5e and v6e), of the whole slice
#     --chips_per_host=4            TPU chips of a machine of the node pool
#     --gpu=TYPE --hosts=N          label cloud.google.com/gke-accelerator of the node pool, and machines
#     --gpus_per_host=8             GPUs of a machine
#     --volume=CLAIM:PATH           PersistentVolumeClaim that all pods can write (Filestore), and where it appears
#     --namespace=default           of Kubernetes
#     --max_restarts=100            restarts of the JobSet, preemptions included
#     --grace=120                   seconds between SIGTERM and SIGKILL: the time to save
#     --dry_run                     print the command, with the manifest
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# 1. Arguments
declare -A FLAG=(
  [name]="" [image]="" [accelerator]="" [topology]="" [chips_per_host]=4 [gpu]="" [hosts]="" [gpus_per_host]=8
  [volume]="" [namespace]=default [max_restarts]=100 [grace]=120
)
parse_flags "$@"
require_name name "the name of the JobSet"
require image "the container image, made from launch/Dockerfile"
require_program
for name in chips_per_host gpus_per_host max_restarts grace; do require_number "$name"; done
[[ -z ${FLAG[volume]} || ${FLAG[volume]} =~ ^[a-z0-9.-]+:/.+$ ]] || die "--volume is CLAIM:/PATH, is '${FLAG[volume]}'"
for name in image namespace gpu; do
  [[ ${FLAG[$name]} =~ ^[A-Za-z0-9_./:@-]*$ ]] || die "--$name has characters that no such name has: '${FLAG[$name]}'"
done

for argument in "${PROGRAM[@]}" "${FLAG[volume]}"; do
  [[ $argument != *[[:cntrl:]]* ]] ||
    die "an argument has a line break or another control character: $(quoted "${argument//[[:cntrl:]]/?}")"
done

# 2. What a pod asks for, and how many there are
if [[ -n ${FLAG[gpu]} ]]; then
  [[ -z ${FLAG[accelerator]}${FLAG[topology]} ]] || die "--gpu goes with --hosts, not with --accelerator and --topology"
  require hosts "the number of machines with --gpus_per_host=${FLAG[gpus_per_host]} GPUs each"
  require_number hosts
  hosts="${FLAG[hosts]}"
  selectors=("cloud.google.com/gke-accelerator: ${FLAG[gpu]}")
  resource="nvidia.com/gpu: ${FLAG[gpus_per_host]}"
  # Nothing tells JAX of the other pods here: name the first one. Its host name is JOBSET-JOB-INDEX-POD.JOBSET.
  PROGRAM+=("--coordinator=${FLAG[name]}-hosts-0-0.${FLAG[name]}:8476" "--num_processes=$hosts")
else
  require accelerator "v4, v5e, v5p or v6e; or --gpu"
  require topology "of the slice, such as 4x4x4"
  case "${FLAG[accelerator]}" in
    v4) label=tpu-v4-podslice dimensions='^([0-9]+)x([0-9]+)x([0-9]+)$' ;;
    v5e) label=tpu-v5-lite-podslice dimensions='^([0-9]+)x([0-9]+)$' ;;
    v5p) label=tpu-v5p-slice dimensions='^([0-9]+)x([0-9]+)x([0-9]+)$' ;;
    v6e) label=tpu-v6e-slice dimensions='^([0-9]+)x([0-9]+)$' ;;
    *) die "--accelerator is v4, v5e, v5p or v6e, is '${FLAG[accelerator]}'" ;;
  esac
  [[ ${FLAG[topology]} =~ $dimensions ]] ||
    die "--topology '${FLAG[topology]}' is not one of ${FLAG[accelerator]}: v4 and v5p have AxBxC, v5e and v6e AxB"
  chips=$((BASH_REMATCH[1] * BASH_REMATCH[2] * ${BASH_REMATCH[3]:-1}))
  ((chips > 0 && FLAG[chips_per_host] > 0)) || die "--topology and --chips_per_host must not be zero"
  per_host=$((chips < FLAG[chips_per_host] ? chips : FLAG[chips_per_host]))
  ((chips % per_host == 0)) ||
    die "--topology ${FLAG[topology]} has $chips chips, no multiple of --chips_per_host=$per_host"
  hosts=$((chips / per_host))
  selectors=("cloud.google.com/gke-tpu-accelerator: $label" "cloud.google.com/gke-tpu-topology: ${FLAG[topology]}")
  resource="google.com/tpu: $per_host"
fi
((hosts > 0)) || die "--hosts must be at least 1"

# 3. The manifest
yaml_string() { # JSON's strings are YAML's
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  printf '"%s"' "$text"
}

arguments() {
  local argument
  for argument in "$@"; do
    printf '                - %s\n' "$(yaml_string "$argument")"
  done
}

# On TPUs GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES: the pods ask for google.com/tpu and have a headless service.
command_lines() {
  if [[ -n ${FLAG[gpu]} ]]; then
    # shellcheck disable=SC2016 # expanded in the pod
    arguments bash -c 'exec "$@" --process_id="$JOB_COMPLETION_INDEX"' bash "${PROGRAM[@]}"
  else
    arguments "${PROGRAM[@]}"
  fi
}

mounts() {
  [[ -n ${FLAG[volume]} ]] || return 0
  cat <<END
              volumeMounts:
              - name: files
                mountPath: $(yaml_string "${FLAG[volume]#*:}")
END
}

volumes() {
  [[ -n ${FLAG[volume]} ]] || return 0
  cat <<END
            volumes:
            - name: files
              persistentVolumeClaim:
                claimName: ${FLAG[volume]%%:*}
END
}

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${FLAG[name]}
  namespace: ${FLAG[namespace]}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a slice is a node pool
spec:
  network:
    enableDNSHostnames: true  # a headless service
  failurePolicy:
    maxRestarts: ${FLAG[max_restarts]}
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0  # a pod that fails takes the others with it: they cannot go on without it
        podFailurePolicy:
          rules:
          - action: Count
            onPodConditions:
            - type: DisruptionTarget
          - action: FailJob
            onExitCodes:
              containerName: program
              operator: In
              values: [1]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: ${FLAG[grace]}
            nodeSelector:
$(printf '              %s\n' "${selectors[@]}")
            tolerations:
            - key: ${resource%%:*}
              operator: Exists
              effect: NoSchedule
            containers:
            - name: program
              image: ${FLAG[image]}
              command:
$(command_lines)
              resources:
                requests:
                  $resource
                limits:
                  $resource
$(mounts)
$(volumes)
END
}

# 4. Apply it
require_command kubectl "see https://kubernetes.io/docs/tasks/tools"
text="$(manifest | sed '/^$/d')"
if $DRY_RUN; then
  printf '%s\n' "kubectl apply --filename=- <<'MANIFEST'" "$text" MANIFEST
else
  kubectl apply --filename=- <<<"$text"
  logs=(kubectl logs "--namespace=${FLAG[namespace]}" --follow)
  logs+=("--selector=jobset.sigs.k8s.io/jobset-name=${FLAG[name]}")
  say "$(quoted "${logs[@]}") shows its output"
fi
