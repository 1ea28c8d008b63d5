;; The guest of the containers' tests: the first letter of argument 1 says what to do.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "ready\n")

  (func $write (param $fd i32) (param $address i32) (param $length i32)
    (local $done i32)
    (loop $again
      (i32.store (i32.const 16) (i32.add (local.get $address) (local.get $done)))
      (i32.store (i32.const 20) (i32.sub (local.get $length) (local.get $done)))
      (if (call $fd_write (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 24))
        (then (call $proc_exit (i32.const 74))))
      (local.set $done (i32.add (local.get $done) (i32.load (i32.const 24))))
      (br_if $again (i32.lt_u (local.get $done) (local.get $length)))))

  (func $cat (local $length i32)
    (loop $again
      (i32.store (i32.const 16) (i32.const 65536))
      (i32.store (i32.const 20) (i32.const 65536))
      (if (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24))
        (then (call $proc_exit (i32.const 74))))
      (local.set $length (i32.load (i32.const 24)))
      (if (local.get $length)
        (then (call $write (i32.const 1) (i32.const 65536) (local.get $length)) (br $again)))))

  (func $flood (local $i i32)            ;; 10 MiB: 160 times the 65,536 bytes 0, 1, … 255, 0, 1, …
    (loop $fill
      (i32.store8 (i32.add (i32.const 65536) (local.get $i)) (local.get $i))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $fill (i32.lt_u (local.get $i) (i32.const 65536))))
    (local.set $i (i32.const 160))
    (loop $again
      (call $write (i32.const 1) (i32.const 65536) (i32.const 65536))
      (local.set $i (i32.sub (local.get $i) (i32.const 1)))
      (br_if $again (local.get $i))))

  (func $sleep                           ;; a clock subscription of 1,000 seconds
    (i32.store (i32.const 272) (i32.const 1))
    (i64.store (i32.const 280) (i64.const 1000000000000))
    (drop (call $poll_oneoff (i32.const 256) (i32.const 512) (i32.const 1) (i32.const 24))))

  (func $fail unreachable)

  (func $dispatch (param $letter i32)
    (if (i32.eq (local.get $letter) (i32.const 0x65)) (then (call $proc_exit (i32.const 7))))          ;; exit
    (if (i32.eq (local.get $letter) (i32.const 0x74)) (then (call $fail)))                             ;; trap
    (if (i32.eq (local.get $letter) (i32.const 0x63)) (then (call $cat)))                              ;; cat
    (if (i32.eq (local.get $letter) (i32.const 0x66)) (then (call $flood)))                            ;; flood
    (if (i32.eq (local.get $letter) (i32.const 0x62))                                                  ;; both
      (then (call $write (i32.const 1) (i32.const 0) (i32.const 6)) (call $write (i32.const 2) (i32.const 0) (i32.const 6))))
    (if (i32.eq (local.get $letter) (i32.const 0x73))                                                  ;; spin
      (then (call $write (i32.const 1) (i32.const 0) (i32.const 6)) (loop $forever (br $forever))))
    (if (i32.eq (local.get $letter) (i32.const 0x7a))                                                  ;; z: sleep
      (then (call $write (i32.const 1) (i32.const 0) (i32.const 6)) (call $sleep))))

  (func (export "_start")
    (if (call $args_sizes_get (i32.const 16) (i32.const 20)) (then unreachable))
    (if (i32.lt_u (i32.load (i32.const 16)) (i32.const 2)) (then (call $proc_exit (i32.const 64))))
    (if (call $args_get (i32.const 1024) (i32.const 2048)) (then unreachable))
    (call $dispatch (i32.load8_u (i32.load (i32.const 1028))))))
