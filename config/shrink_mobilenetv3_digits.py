# Once-for-all's progressive shrinking on digits, in minutes on a laptop, then evolutionary search
# over all networks it has trained. It starts from the largest network:
# python train.py config/train_mobilenetv3_digits.py
# python train_search.py config/shrink_mobilenetv3_digits.py
include('search_mobilenetv3_digits.py')
out_dir = 'out/shrink_mobilenetv3_digits'
optimizer = 'spos'
inherit = 'out/train_mobilenetv3_digits'
teacher = 'out/train_mobilenetv3_digits'
shrink = 'kernel_size=3, depth=2, depth=1, expand=4, expand=3'
subnets_per_step = 2
train_portion = 0.8
max_iters = 1000
eval_interval = 200
learning_rate = 0.03
warmup_iters = 10
