;; Closes stderr, creates the file "new", and traps: nothing may be written to the file.
(module
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 8) "new")
  (func (export "_start")
    (drop (call $fd_close (i32.const 2)))
    (drop (call $path_open (i32.const 3) (i32.const 0) (i32.const 8) (i32.const 3)
      (i32.const 1) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 0)))
    (unreachable)))
