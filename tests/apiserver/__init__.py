"""A Kubernetes API server for tests: over real HTTP, in memory, exact where a client can tell.

Each rule cites the page of the Kubernetes documentation it follows; the pages are:

- api-concepts: https://kubernetes.io/docs/reference/using-api/api-concepts/
- server-side-apply: https://kubernetes.io/docs/reference/using-api/server-side-apply/
- api-conventions: https://github.com/kubernetes/community/blob/master/contributors/devel/sig-architecture/api-conventions.md
- crds: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
- finalizers: https://kubernetes.io/docs/concepts/overview/working-with-objects/finalizers/
- csr: https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/
- csr-v1: https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/certificate-signing-request-v1/

What it does not do: CEL rules and formats of CRDs, admission, conversion other than None, quotas,
controllers (but garbage of deleted namespaces and owners), protobuf, WatchList.
"""
