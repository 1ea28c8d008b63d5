;; Takes memory until somebody stops it: every page of 64 KiB is written to.
(module
  (memory (export "memory") 1)
  (func (export "_start") (local $page i32)
    (loop $again
      (local.set $page (memory.grow (i32.const 1)))
      (if (i32.ge_s (local.get $page) (i32.const 0))
        (then (memory.fill (i32.shl (local.get $page) (i32.const 16)) (i32.const 1) (i32.const 65536))
              (br $again))))
    unreachable))
